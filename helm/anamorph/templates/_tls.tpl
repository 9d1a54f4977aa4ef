{{/* PEM certificates that our processes trust, beside the usual ones. */}}
{{- define "anamorph.caText" -}}
{{- required "tls.ca: give the PEM certificate of the authority (--set-file tls.ca=ca.crt), or tls.caConfigMap" .Values.tls.ca | trim -}}
{{- end -}}

{{/* Names in the key service's certificate, as a YAML list. */}}
{{- define "anamorph.keysvcNames" -}}
{{- $name := include "anamorph.name" (list . "keysvc") -}}
- {{ $name }}
- {{ $name }}.{{ .Release.Namespace }}
- {{ $name }}.{{ .Release.Namespace }}.svc
- {{ $name }}.{{ .Release.Namespace }}.svc.{{ .Values.clusterDomain }}
- localhost
{{- end -}}

{{/* Names in the certificate of Ray Serve: any serving cluster of the compute namespace. */}}
{{- define "anamorph.serveNames" -}}
- "*.{{ .Values.namespaces.compute.name }}.svc"
- "*.{{ .Values.namespaces.compute.name }}.svc.{{ .Values.clusterDomain }}"
- localhost
{{- end -}}
