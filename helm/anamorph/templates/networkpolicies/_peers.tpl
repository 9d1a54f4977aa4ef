{{/* Pods of the release in its own namespace: list root components… */}}
{{- define "anamorph.ourPods" -}}
podSelector:
  matchLabels:
    app.kubernetes.io/name: anamorph
    app.kubernetes.io/instance: {{ (index . 0).Release.Name }}
  matchExpressions:
    - key: app.kubernetes.io/component
      operator: In
      values: {{ toJson (rest .) }}
{{- end -}}

{{/* The same, seen from another namespace. */}}
{{- define "anamorph.ourPodsFromAfar" -}}
namespaceSelector:
  matchLabels:
    kubernetes.io/metadata.name: {{ (index . 0).Release.Namespace }}
{{ include "anamorph.ourPods" . }}
{{- end -}}

{{/* All pods of a zone: list root zone. */}}
{{- define "anamorph.zonePods" -}}
namespaceSelector:
  matchLabels:
    kubernetes.io/metadata.name: {{ (index (index . 0).Values.namespaces (index . 1)).name }}
{{- end -}}

{{/* One egress rule: dict to ports. */}}
{{- define "anamorph.egress" -}}
- to:
    {{- toYaml .to | nindent 4 }}
  ports:
    {{- range .ports }}
    - {protocol: TCP, port: {{ . }}}
    {{- end }}
{{- end -}}

{{- define "anamorph.egressDns" -}}
- to:
    {{- toYaml .Values.networkPolicies.dns.to | nindent 4 }}
  ports:
    - {protocol: UDP, port: 53}
    - {protocol: TCP, port: 53}
{{- end -}}

{{/* Egress to something outside the chart, whose place must be known: list root name what. */}}
{{- define "anamorph.egressTo" -}}
{{- $root := index . 0 -}}{{- $place := get $root.Values.networkPolicies (index . 1) -}}
{{- if not $place.to -}}
{{- fail (printf "networkPolicies.%s.to: say where %s is, as NetworkPolicy peers ([{ipBlock: {cidr: …}}]); or set networkPolicies.enabled=false" (index . 1) (index . 2)) -}}
{{- end -}}
{{- include "anamorph.egress" $place -}}
{{- end -}}

{{- define "anamorph.egressApiServer" -}}
{{- $cidrs := .Values.networkPolicies.apiServer.cidrs -}}
{{- $ports := .Values.networkPolicies.apiServer.ports -}}
{{- if not $cidrs -}}
{{- $slice := lookup "discovery.k8s.io/v1" "EndpointSlice" "default" "kubernetes" -}}
{{- range ($slice.endpoints | default list) -}}
{{- range .addresses -}}
{{- $cidrs = append $cidrs (printf "%s/%s" . (ternary "128" "32" (contains ":" .))) -}}
{{- end -}}
{{- end -}}
{{- range ($slice.ports | default list) -}}{{- $ports = append $ports .port -}}{{- end -}}
{{- end -}}
{{- if not $cidrs -}}
{{- fail "networkPolicies.apiServer.cidrs: name the API server's addresses, since no cluster was asked (kubectl -n default get endpointslice kubernetes)" -}}
{{- end -}}
- to:
    {{- range $cidrs | uniq }}
    - ipBlock: {cidr: {{ . }}}
    {{- end }}
  ports:
    {{- range $ports | uniq }}
    - {protocol: TCP, port: {{ . }}}
    {{- end }}
{{- end -}}

{{- define "anamorph.egressDatabase" -}}
{{- if .Values.evaluation.postgresql.enabled -}}
{{- include "anamorph.egress" (dict "to" (list (include "anamorph.ourPods" (list . "postgresql") | fromYaml)) "ports" (list 5432)) -}}
{{- else -}}
{{- include "anamorph.egressTo" (list . "database" "PostgreSQL") -}}
{{- end -}}
{{- end -}}

{{- define "anamorph.egressVault" -}}
{{- if .Values.evaluation.vault.enabled -}}
{{- include "anamorph.egress" (dict "to" (list (include "anamorph.ourPods" (list . "vault") | fromYaml)) "ports" (list 8200)) -}}
{{- else -}}
{{- include "anamorph.egressTo" (list . "vault" "Vault") -}}
{{- end -}}
{{- end -}}

{{- define "anamorph.egressStorage" -}}
{{- if .Values.evaluation.objectStore.enabled -}}
{{- include "anamorph.egress" (dict "to" (list (include "anamorph.ourPodsFromAfar" (list . "objectstore") | fromYaml)) "ports" (list 8333)) -}}
{{- else -}}
{{- include "anamorph.egressTo" (list . "storage" "the object store") -}}
{{- end -}}
{{- end -}}

{{- define "anamorph.egressOtlp" -}}
{{- if .Values.otlp.endpoint -}}
{{- include "anamorph.egressTo" (list . "otlp" "the collector") -}}
{{- end -}}
{{- end -}}

{{/* Head of a policy: list root component namespace pods. */}}
{{- define "anamorph.policyMetadata" -}}
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata:
  name: {{ include "anamorph.name" (list (index . 0) (index . 1)) }}
  namespace: {{ index . 2 }}
  labels:
    {{- include "anamorph.labels" (list (index . 0) (index . 1)) | nindent 4 }}
{{- end -}}
