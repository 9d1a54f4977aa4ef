"""One engine that tenants share: weights of one key at a time in each slot.

pool.py       the members, and what the operator changes
seat.py       one member as it is answered
engine.py     swaps, admits and steps as the scheduler says
scheduler.py  whose turn it is: a pure state machine
fairness.py   shares and limits in numbers
base.py       what a pool needs of an engine
fake.py       slots without a model
torch.py      slots of the torch engine
slot.py       one of these
host.py       replicas in host memory, from which they are filled
shape.py      what all members must have in common
metrics.py    what a pool tells of itself
"""
