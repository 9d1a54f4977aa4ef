{{/* Pod security "restricted": list uid. */}}
{{- define "anamorph.podSecurity" -}}
runAsNonRoot: true
runAsUser: {{ . }}
runAsGroup: {{ . }}
fsGroup: {{ . }}
fsGroupChangePolicy: OnRootMismatch
seccompProfile:
  type: RuntimeDefault
{{- end -}}

{{- define "anamorph.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end -}}

{{/* What a pod of a component has in common with all others: list root component settings. */}}
{{- define "anamorph.podCommon" -}}
{{- $root := index . 0 -}}{{- $component := index . 1 -}}{{- $pod := index . 2 -}}
enableServiceLinks: false
securityContext:
  {{- include "anamorph.podSecurity" 65532 | nindent 2 }}
{{- with $root.Values.images.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
{{- with $pod.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with $pod.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $pod.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $pod.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{/* Replicas on other nodes and zones where there are any: list root component settings. */}}
{{- define "anamorph.spread" -}}
topologySpreadConstraints:
{{- with (index . 2).topologySpreadConstraints }}
  {{- toYaml . | nindent 2 }}
{{- else }}
  {{- range $key := list "kubernetes.io/hostname" "topology.kubernetes.io/zone" }}
  - maxSkew: 1
    topologyKey: {{ $key }}
    whenUnsatisfiable: ScheduleAnyway
    labelSelector:
      matchLabels:
        {{- include "anamorph.selector" (list (index $ 0) (index $ 1)) | nindent 8 }}
  {{- end }}
{{- end }}
{{- end -}}

{{/* A container of one of our images: list root image settings. */}}
{{- define "anamorph.containerCommon" -}}
{{- $root := index . 0 -}}{{- $settings := index . 2 -}}
image: {{ include "anamorph.image" (list $root (index . 1)) }}
imagePullPolicy: {{ $root.Values.images.pullPolicy }}
securityContext:
  {{- include "anamorph.containerSecurity" . | nindent 2 }}
{{- with $settings.resources }}
resources:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{/* Variables of our processes: list root settings. */}}
{{- define "anamorph.env" -}}
- name: ANAMORPH_CA_FILE
  value: /etc/anamorph/ca/ca.crt
- name: HOME
  value: /tmp
{{- with (index . 1).extraEnv }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* Volumes that every pod of ours has: list root settings. */}}
{{- define "anamorph.volumes" -}}
- name: tmp
  emptyDir: {sizeLimit: 64Mi}
- name: ca
  configMap:
    name: {{ include "anamorph.caConfigMap" (index . 0) }}
{{- with (index . 1).extraVolumes }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "anamorph.mounts" -}}
- name: tmp
  mountPath: /tmp
- name: ca
  mountPath: /etc/anamorph/ca
  readOnly: true
{{- with (index . 1).extraVolumeMounts }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* A token of the pod's service account that is good at the key service alone. */}}
{{- define "anamorph.tokenVolume" -}}
- name: token
  projected:
    defaultMode: 0440
    sources:
      - serviceAccountToken:
          audience: {{ .Values.keysvc.identity.audience }}
          expirationSeconds: 3600
          path: token
{{- end -}}

{{/* libpq reads its password file only if nobody else can, which no Secret volume offers: it is copied. */}}
{{- define "anamorph.passwordFile" -}}
{{- $root := index . 0 -}}
- name: password-file
  image: {{ include "anamorph.image" (list $root $root.Values.images.keysvc) }}
  imagePullPolicy: {{ $root.Values.images.pullPolicy }}
  securityContext:
    {{- include "anamorph.containerSecurity" . | nindent 4 }}
  resources:
    requests: {cpu: 10m, memory: 32Mi}
    limits: {memory: 64Mi}
  command: [python, -c]
  args:
    - |
      import os, pathlib
      password = pathlib.Path("/etc/anamorph/password/password").read_text().rstrip("\n")
      escaped = password.replace("\\", "\\\\").replace(":", "\\:")
      os.umask(0o077)
      pathlib.Path("/run/anamorph/pgpass").write_text(f"*:*:*:*:{escaped}\n")
  volumeMounts:
    - name: password
      mountPath: /etc/anamorph/password
      readOnly: true
    - name: run
      mountPath: /run/anamorph
{{- end -}}

{{/* The Secret with a database role's password: list secret. */}}
{{- define "anamorph.passwordVolumes" -}}
- name: password
  secret:
    secretName: {{ .name }}
    items:
      - key: {{ .key }}
        path: password
- name: run
  emptyDir: {medium: Memory, sizeLimit: 1Mi}
{{- end -}}
