{{/* Key service: its configuration file, checked against the service's own settings by a test. */}}
{{- define "anamorph.keysvcSettings" -}}
{{- $keysvc := .Values.keysvc -}}
{{- $accounts := list (dict "namespace" .Release.Namespace "service_account" (include "anamorph.name" (list . "operator")) "role" "platform") -}}
{{- if .Values.canary.enabled -}}
{{- $accounts = append $accounts (dict "namespace" .Release.Namespace "service_account" (include "anamorph.name" (list . "canary")) "role" "platform") -}}
{{- end -}}
{{- if .Values.tests.enabled -}}
{{- $accounts = append $accounts (dict "namespace" .Release.Namespace "service_account" (include "anamorph.name" (list . "test")) "role" "platform") -}}
{{- end -}}
{{- $accounts = append $accounts (dict "namespace" .Values.namespaces.jobs.name "service_account" "materializer-*" "tenant_from" "name" "role" "materializer") -}}
{{- $kubernetes := dict "audiences" (list $keysvc.identity.audience) "bindings" (concat $accounts $keysvc.identity.bindings) -}}
{{- $identity := dict "kubernetes" $kubernetes -}}
{{- if $keysvc.identity.oidc -}}
{{- $identity = set $identity "oidc" $keysvc.identity.oidc -}}
{{- end -}}
{{- $audit := dict "interval_s" $keysvc.audit.intervalSeconds -}}
{{- if $keysvc.audit.destination -}}
{{- $audit = set $audit "destination" $keysvc.audit.destination -}}
{{- end -}}
{{- $settings := dict
      "database" (include "anamorph.databaseUrl" (list . "anamorph_service"))
      "pool_size" $keysvc.database.poolSize
      "platform_key_file" "/run/anamorph/platform-admin.key"
      "vault" (include "anamorph.vaultSettings" . | fromYaml)
      "identity" $identity
      "audit" $audit -}}
{{- with $keysvc.limits -}}{{- $settings = set $settings "limits" . -}}{{- end -}}
{{- with $keysvc.webhooks -}}{{- $settings = set $settings "webhooks" . -}}{{- end -}}
{{- toToml $settings -}}
{{- end -}}

{{- define "anamorph.vaultSettings" -}}
{{- $vault := .Values.keysvc.vault -}}
{{- $login := dict "method" "kubernetes" "mount" $vault.authMount "token_file" "/var/run/secrets/anamorph/vault/token" -}}
{{- $settings := dict "address" (include "anamorph.vaultAddress" .) "ca_file" "/etc/anamorph/vault-ca/ca.crt" "mount" $vault.mount "issuer" $login "releaser" $login "shredder" $login -}}
{{- with $vault.namespace -}}{{- $settings = set $settings "namespace" . -}}{{- end -}}
{{- with $vault.extra -}}{{- $settings = merge $settings . -}}{{- end -}}
{{- toYaml $settings -}}
{{- end -}}

{{- define "anamorph.vaultAddress" -}}
{{- if .Values.evaluation.vault.enabled -}}
https://{{ include "anamorph.name" (list . "vault") }}.{{ .Release.Namespace }}.svc:8200
{{- else -}}
{{ required "keysvc.vault.address: name your Vault (https://host:port), or use values-evaluation.yaml" .Values.keysvc.vault.address }}
{{- end -}}
{{- end -}}

{{- define "anamorph.databaseHost" -}}
{{- if .Values.evaluation.postgresql.enabled -}}
{{ include "anamorph.name" (list . "postgresql") }}.{{ .Release.Namespace }}.svc
{{- else -}}
{{ required "keysvc.database.host: name your PostgreSQL server, or use values-evaluation.yaml" .Values.keysvc.database.host }}
{{- end -}}
{{- end -}}

{{/* URL of the database for a role, without a password: list root role. */}}
{{- define "anamorph.databaseUrl" -}}
{{- $root := index . 0 -}}{{- $database := $root.Values.keysvc.database -}}
postgresql://{{ index . 1 }}@{{ include "anamorph.databaseHost" $root }}:{{ $database.port }}/{{ $database.name }}?sslmode=verify-full&sslrootcert=/etc/anamorph/database-ca/ca.crt
{{- end -}}

{{/* Secret with the password of a role: list root role. */}}
{{- define "anamorph.databasePassword" -}}
{{- $root := index . 0 -}}
{{- if $root.Values.evaluation.postgresql.enabled -}}
name: {{ include "anamorph.name" (list $root "postgresql") }}
key: {{ index . 1 }}
{{- else -}}
{{- $secret := get $root.Values.keysvc.database.passwords (index . 1) -}}
name: {{ required (printf "keysvc.database.passwords.%s.name: name the Secret with this role's password" (index . 1)) $secret.name }}
key: {{ $secret.key }}
{{- end -}}
{{- end -}}

{{- define "anamorph.databaseCaVolume" -}}
- name: database-ca
  configMap:
    name: {{ .Values.keysvc.database.caConfigMap | default (include "anamorph.caConfigMap" .) }}
{{- end -}}

{{/* Volumes of a pod that runs the key service's program. */}}
{{- define "anamorph.keysvcVolumes" -}}
{{ include "anamorph.volumes" (list . .Values.keysvc) }}
{{ include "anamorph.databaseCaVolume" . }}
{{ include "anamorph.passwordVolumes" (include "anamorph.databasePassword" (list . "service") | fromYaml) }}
- name: config
  configMap:
    name: {{ include "anamorph.name" (list . "keysvc") }}
- name: vault-ca
  configMap:
    name: {{ .Values.keysvc.vault.caConfigMap | default (include "anamorph.caConfigMap" .) }}
- name: vault-token
  projected:
    defaultMode: 0440
    sources:
      - serviceAccountToken:
          audience: {{ .Values.keysvc.vault.audience }}
          expirationSeconds: 3600
          path: token
{{- end -}}

{{- define "anamorph.keysvcMounts" -}}
{{ include "anamorph.mounts" (list . .Values.keysvc) }}
- name: database-ca
  mountPath: /etc/anamorph/database-ca
  readOnly: true
- name: run
  mountPath: /run/anamorph
- name: config
  mountPath: /etc/anamorph/keysvc
  readOnly: true
- name: vault-ca
  mountPath: /etc/anamorph/vault-ca
  readOnly: true
- name: vault-token
  mountPath: /var/run/secrets/anamorph/vault
  readOnly: true
{{- end -}}

{{- define "anamorph.keysvcEnv" -}}
{{ include "anamorph.env" (list . .Values.keysvc) }}
- name: PGPASSFILE
  value: /run/anamorph/pgpass
{{- with .Values.keysvc.audit.credentialsSecret }}
{{- include "anamorph.storeCredential" (list .) }}
{{- end }}
{{- with include "anamorph.storeEndpoint" (list .Values.keysvc.audit.endpointUrl) }}
{{ . }}
{{- end }}
{{- end -}}

{{- define "anamorph.keysvcTlsSecret" -}}
{{ .Values.tls.secrets.keysvc | default (printf "%s-tls" (include "anamorph.name" (list . "keysvc"))) }}
{{- end -}}

{{- define "anamorph.serveTlsSecret" -}}
{{ .Values.tls.secrets.serve | default (printf "%s-tls" (include "anamorph.name" (list . "serve"))) }}
{{- end -}}

{{- define "anamorph.rayCaSecret" -}}
{{- if .Values.tls.secrets.rayCa -}}
{{- .Values.tls.secrets.rayCa -}}
{{- else if ne .Values.tls.source "existing" -}}
{{- include "anamorph.name" (list . "ray-ca") -}}
{{- end -}}
{{- end -}}

{{- define "anamorph.caConfigMap" -}}
{{ .Values.tls.caConfigMap | default (include "anamorph.name" (list . "ca")) }}
{{- end -}}

{{/* Operator: its options (anamorph_operator.kubernetes.options). */}}
{{- define "anamorph.operatorSettings" -}}
{{- $operator := .Values.operator -}}{{- $jobs := .Values.materializer -}}
{{- $ca := include "anamorph.caConfigMap" . -}}
{{- $settings := dict
      "namespace" .Release.Namespace
      "jobs_namespace" .Values.namespaces.jobs.name
      "compute_namespace" .Values.namespaces.compute.name
      "keysvc" (include "anamorph.keysvcUrl" .)
      "keysvc_token_file" "/var/run/secrets/anamorph/token"
      "audience" .Values.keysvc.identity.audience
      "ca_file" "/etc/anamorph/ca/ca.crt"
      "ray_tokens" "/etc/anamorph/ray"
      "allow_base" $operator.allowBase
      "interval_s" $operator.intervalSeconds
      "parallel_jobs" $jobs.parallelJobs
      "port" 8080 -}}
{{- with .Values.otlp.endpoint -}}{{- $settings = set $settings "otlp_endpoint" . -}}{{- end -}}
{{- $job := dict
      "image" (include "anamorph.image" (list . .Values.images.materializer))
      "pull_policy" .Values.images.pullPolicy
      "pull_secrets" .Values.images.pullSecrets
      "ca_config_map" $ca
      "cpu" (toString $jobs.cpu)
      "memory" (toString $jobs.memory)
      "scratch" (toString $jobs.scratch)
      "parts" $jobs.parts
      "parallel" $jobs.parallel
      "access_mode" $jobs.accessMode
      "deadline_s" $jobs.deadlineSeconds
      "keep_s" $jobs.keepSeconds
      "attempts" $jobs.attempts
      "node_selector" $jobs.nodeSelector
      "tolerations" $jobs.tolerations -}}
{{- with $jobs.storageClass -}}{{- $job = set $job "storage_class" . -}}{{- end -}}
{{- with $jobs.priorityClassName -}}{{- $job = set $job "priority_class" . -}}{{- end -}}
{{- with $jobs.basesClaim -}}{{- $job = set $job "bases_claim" . -}}{{- end -}}
{{- $compute := dict
      "pull_policy" .Values.images.pullPolicy
      "pull_secrets" .Values.images.pullSecrets
      "tls_secret" (include "anamorph.serveTlsSecret" .)
      "ca_config_map" $ca -}}
{{- with include "anamorph.rayCaSecret" . -}}{{- $compute = set $compute "ray_ca_secret" . -}}{{- end -}}
{{- toYaml (merge $settings (dict "materializer" $job "compute" $compute)) -}}
{{- end -}}

{{/* CA of the database for a hook, which runs before the release's own objects are there. */}}
{{- define "anamorph.hookCaConfigMap" -}}
{{ .Values.keysvc.database.caConfigMap | default .Values.tls.caConfigMap | default (include "anamorph.name" (list . "migration-ca")) }}
{{- end -}}

{{/* Variables for a store of one's own, whose certificate our authority has signed: list url. */}}
{{- define "anamorph.storeEndpoint" -}}
{{- with index . 0 -}}
- name: AWS_ENDPOINT_URL_S3
  value: {{ . | quote }}
- name: AWS_CA_BUNDLE
  value: /etc/anamorph/ca/ca.crt
{{- end -}}
{{- end -}}

{{/* Variables with a store's credential: list secret. */}}
{{- define "anamorph.storeCredential" -}}
{{- $secret := index . 0 -}}
{{- range $name := list "AWS_ACCESS_KEY_ID" "AWS_SECRET_ACCESS_KEY" }}
- name: {{ $name }}
  valueFrom:
    secretKeyRef:
      name: {{ $secret }}
      key: {{ $name }}
{{- end }}
{{- end -}}
