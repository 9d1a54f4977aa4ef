{{/* The two ways in, as a YAML list of dicts: list root. */}}
{{- define "anamorph.ways" -}}
{{- if .Values.routes.inference.host }}
{{- if .Values.servingCluster.spec.existing }}
{{- fail "routes.inference.host: a Ray cluster that is there already has its own way in; say it as servingCluster.spec.publicUrl" }}
{{- end }}
- name: inference
  host: {{ .Values.routes.inference.host }}
  namespace: {{ .Values.namespaces.compute.name }}
  service: {{ include "anamorph.serveService" . }}
  serverName: {{ include "anamorph.serveHost" . }}
  port: 8000
  tlsSecret: {{ .Values.routes.inference.tlsSecret | quote }}
  annotations: {{ toJson .Values.routes.inference.annotations }}
{{- end }}
{{- if and .Values.routes.admin.host .Values.keysvc.enabled }}
- name: admin
  host: {{ .Values.routes.admin.host }}
  namespace: {{ .Release.Namespace }}
  service: {{ include "anamorph.name" (list . "keysvc") }}
  serverName: {{ include "anamorph.name" (list . "keysvc") }}.{{ .Release.Namespace }}.svc
  port: {{ .Values.keysvc.service.port }}
  tlsSecret: {{ .Values.routes.admin.tlsSecret | quote }}
  annotations: {{ toJson .Values.routes.admin.annotations }}
{{- end }}
{{- end -}}
