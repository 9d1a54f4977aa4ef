{{/* A value of a Secret that is there already, else a new one: list root namespace name key. */}}
{{- define "anamorph.kept" -}}
{{- $found := lookup "v1" "Secret" (index . 1) (index . 2) -}}
{{- $value := get ($found.data | default dict) (index . 3) -}}
{{- if $value -}}{{- $value | b64dec -}}{{- else -}}{{- randAlphaNum 32 -}}{{- end -}}
{{- end -}}

{{/* Head of a Secret that outlives the release, as the volumes do: list root component name namespace. */}}
{{- define "anamorph.evaluationSecret" -}}
apiVersion: v1
kind: Secret
metadata:
  name: {{ index . 2 }}
  namespace: {{ index . 3 }}
  labels:
    {{- include "anamorph.labels" (list (index . 0) (index . 1)) | nindent 4 }}
    anamorph.dev/evaluation: "true"
  annotations:
    helm.sh/resource-policy: keep
{{- end -}}

{{/* An image of somebody else's. */}}
{{- define "anamorph.foreignImage" -}}
{{- include "anamorph.reference" (list .repository .tag .digest) -}}
{{- end -}}

{{/* Head of a StatefulSet with one pod, up to its template's spec: list root component namespace. */}}
{{- define "anamorph.evaluationSet" -}}
{{- $root := index . 0 -}}{{- $settings := get $root.Values.evaluation (index . 3) -}}
apiVersion: apps/v1
kind: StatefulSet
metadata:
  name: {{ include "anamorph.name" . }}
  namespace: {{ index . 2 }}
  labels:
    {{- include "anamorph.labels" . | nindent 4 }}
    anamorph.dev/evaluation: "true"
spec:
  replicas: 1
  serviceName: {{ include "anamorph.name" . }}
  # The volume stays when the release goes: it holds what cannot be made again.
  persistentVolumeClaimRetentionPolicy: {whenDeleted: Retain, whenScaled: Retain}
  selector:
    matchLabels:
      {{- include "anamorph.selector" . | nindent 6 }}
  volumeClaimTemplates:
    - metadata:
        name: data
      spec:
        accessModes: [ReadWriteOnce]
        {{- with $settings.storageClass }}
        storageClassName: {{ . }}
        {{- end }}
        resources:
          requests:
            storage: {{ $settings.storage }}
{{- end -}}

{{/* Service of such a StatefulSet: list root component namespace port. */}}
{{- define "anamorph.evaluationService" -}}
apiVersion: v1
kind: Service
metadata:
  name: {{ include "anamorph.name" . }}
  namespace: {{ index . 2 }}
  labels:
    {{- include "anamorph.labels" . | nindent 4 }}
    anamorph.dev/evaluation: "true"
spec:
  selector:
    {{- include "anamorph.selector" . | nindent 4 }}
  ports:
    - name: tcp
      port: {{ index . 3 }}
      targetPort: {{ index . 3 }}
{{- end -}}

{{/* Security and scheduling of its pod: settings. */}}
{{- define "anamorph.evaluationPod" -}}
enableServiceLinks: false
securityContext:
  {{- include "anamorph.podSecurity" (int .uid) | nindent 2 }}
{{- end -}}

{{- define "anamorph.evaluationContainer" -}}
image: {{ include "anamorph.foreignImage" .image }}
imagePullPolicy: IfNotPresent
securityContext:
  {{- include "anamorph.containerSecurity" . | nindent 2 }}
resources:
  {{- toYaml .resources | nindent 2 }}
{{- end -}}
