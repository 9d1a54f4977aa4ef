{{/* The test's EncryptedModel. Of other settings another model is made: what clients hold never changes. */}}
{{- define "anamorph.testModel" -}}
{{- $tests := .Values.tests -}}
{{- if not (and .Values.keysvc.enabled .Values.operator.enabled .Values.servingCluster.enabled) -}}
{{- fail "tests.enabled: helm test needs key service, operator and serving cluster of this release" -}}
{{- end -}}
{{- if not (and $tests.model.base $tests.model.vocabSize $tests.model.contextLength) -}}
{{- fail "tests.model: say which small model helm test is to serve: base.uri (s3://bases/…), vocabSize and contextLength" -}}
{{- end -}}
{{- $name := include "anamorph.testModelName" . -}}
{{- $policy := dict "clientCacheTtlSeconds" 5 "longestRequestSeconds" 30 "clockSkewSeconds" 5 "propagationSeconds" 10 "graceSeconds" 60 "destroyDelaySeconds" 0 -}}
{{- $own := dict "tenant" $tests.tenant "model" $name "servingCluster" .Values.servingCluster.name "rotationPolicy" $policy -}}
{{- /* In float32 two keys' rounding does not show in the answer. */ -}}
{{- $default := dict "dtype" "float32" -}}
apiVersion: anamorph.dev/v1alpha1
kind: EncryptedModel
metadata:
  name: {{ $name }}
  namespace: {{ $tests.namespace }}
spec:
  {{- toYaml (merge $own $tests.model $default) | nindent 2 }}
{{- end -}}

{{- define "anamorph.testModelName" -}}
check-{{ toJson .Values.tests.model | sha256sum | trunc 8 }}
{{- end -}}
