"""From a replica's folder to tokens. Neither HTTP nor the door is known here.

base.py       what every engine offers
loading.py    settings → a verified folder → a loaded engine
coldstart.py  how long that took, phase by phase
folder.py     what the folder's own configuration says
fake.py       deterministic, without a model
torch.py      transformers' continuous batching
sampler.py    every option of a request, for torch
ranks/        one model over several processes, for torch
vllm/         stock vLLM
"""
