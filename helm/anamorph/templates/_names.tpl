{{/* The name that everything of a release begins with. */}}
{{- define "anamorph.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride -}}
{{- else if contains "anamorph" .Release.Name -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-anamorph" .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{/* Name of a component: list root component. */}}
{{- define "anamorph.name" -}}
{{- printf "%s-%s" (include "anamorph.fullname" (index . 0)) (index . 1) -}}
{{- end -}}

{{/* Name of something cluster-wide: no two releases share it. */}}
{{- define "anamorph.clusterName" -}}
{{- printf "%s:%s-%s" (index . 0).Release.Namespace (include "anamorph.fullname" (index . 0)) (index . 1) -}}
{{- end -}}

{{/* Labels that select the pods of a component: list root component. */}}
{{- define "anamorph.selector" -}}
app.kubernetes.io/name: anamorph
app.kubernetes.io/instance: {{ (index . 0).Release.Name }}
app.kubernetes.io/component: {{ index . 1 }}
{{- end -}}

{{/* Labels of every object: list root component. */}}
{{- define "anamorph.labels" -}}
{{- $root := index . 0 -}}
{{ include "anamorph.selector" . }}
app.kubernetes.io/part-of: anamorph
app.kubernetes.io/version: {{ $root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ $root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" $root.Chart.Name $root.Chart.Version }}
{{- with $root.Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* An image by its digest where one is given, else by its tag: list root image. */}}
{{- define "anamorph.image" -}}
{{- $root := index . 0 -}}{{- $image := index . 1 -}}
{{- $name := $image.repository -}}
{{- if $root.Values.images.registry -}}
{{- $name = printf "%s/%s" $root.Values.images.registry $name -}}
{{- end -}}
{{- include "anamorph.reference" (list $name ($image.tag | default $root.Values.images.tag | default $root.Chart.AppVersion) $image.digest) -}}
{{- end -}}

{{- define "anamorph.reference" -}}
{{- if index . 2 -}}
{{- printf "%s@%s" (index . 0) (index . 2) -}}
{{- else -}}
{{- printf "%s:%s" (index . 0) (index . 1) -}}
{{- end -}}
{{- end -}}

{{/* Image of the chart's own serving cluster: of one that is there never another, as it cannot change. */}}
{{- define "anamorph.rayImage" -}}
{{- $kept := lookup "anamorph.dev/v1alpha1" "ServingCluster" .Values.namespaces.compute.name .Values.servingCluster.name -}}
{{- dig "spec" "ray" "image" "" $kept | default (include "anamorph.image" (list . .Values.images.compute)) -}}
{{- end -}}

{{/* URL of the key service, for everybody in the cluster. */}}
{{- define "anamorph.keysvcUrl" -}}
https://{{ include "anamorph.name" (list . "keysvc") }}.{{ .Release.Namespace }}.svc:{{ .Values.keysvc.service.port }}
{{- end -}}

{{/* Service of Ray Serve of the chart's own serving cluster: workers', or of a head that is alone. */}}
{{- define "anamorph.serveService" -}}
{{ .Values.servingCluster.name }}-{{ ternary "serve" "head" (not (empty (dig "ray" "workerGroups" list .Values.servingCluster.spec))) }}-svc
{{- end -}}

{{/* Host of Ray Serve. */}}
{{- define "anamorph.serveHost" -}}
{{ include "anamorph.serveService" . }}.{{ .Values.namespaces.compute.name }}.svc
{{- end -}}

{{- define "anamorph.serveUrl" -}}
{{- if .Values.servingCluster.spec.existing -}}
{{- .Values.servingCluster.spec.existing.serveUrl -}}
{{- else -}}
https://{{ include "anamorph.serveHost" . }}:8000
{{- end -}}
{{- end -}}
