{{- define "sailyard.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- if contains $name .Release.Name -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name $name | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* Labels of an object. Takes (dict "root" $ "component" "scheduler"). */}}
{{- define "sailyard.labels" -}}
{{ include "sailyard.selector" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version }}
{{- end -}}

{{- define "sailyard.selector" -}}
app.kubernetes.io/name: sailyard
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end -}}

{{/* An image. Takes (dict "root" $ "image" .Values.images.slim). */}}
{{- define "sailyard.image" -}}
{{- $registry := .root.Values.images.registry -}}
{{- $name := ternary .image.repository (printf "%s/%s" $registry .image.repository) (empty $registry) -}}
{{- if .image.digest -}}
{{- printf "%s@%s" $name .image.digest -}}
{{- else -}}
{{- printf "%s:%s" $name (default .root.Chart.AppVersion .image.tag) -}}
{{- end -}}
{{- end -}}

{{/* Names of the Secrets, given or made. */}}
{{- define "sailyard.secret.yard" -}}
{{- default (printf "%s-yard" (include "sailyard.fullname" .)) .Values.existingSecrets.yard -}}
{{- end -}}
{{- define "sailyard.secret.airflow" -}}
{{- default (printf "%s-airflow" (include "sailyard.fullname" .)) .Values.existingSecrets.airflow -}}
{{- end -}}
{{- define "sailyard.secret.airflowLogin" -}}
{{- default (printf "%s-airflow-login" (include "sailyard.fullname" .)) .Values.existingSecrets.airflowLogin -}}
{{- end -}}
{{- define "sailyard.secret.endpoint" -}}
{{- default (printf "%s-endpoint" (include "sailyard.fullname" .)) .Values.existingSecrets.endpoint -}}
{{- end -}}

{{- define "sailyard.cacheClaim" -}}
{{- if .Values.launcher.cache.enabled -}}
{{- default (printf "%s-cache" (include "sailyard.fullname" .)) .Values.launcher.cache.existingClaim -}}
{{- end -}}
{{- end -}}

{{/* What every pod of ours is held to. */}}
{{- define "sailyard.podSecurity" -}}
securityContext:
  runAsNonRoot: true
  runAsUser: {{ . }}
  runAsGroup: {{ . }}
  fsGroup: {{ . }}
  fsGroupChangePolicy: OnRootMismatch
  seccompProfile: {type: RuntimeDefault}
enableServiceLinks: false
{{- end -}}

{{- define "sailyard.containerSecurity" -}}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities: {drop: [ALL]}
{{- end -}}

{{- define "sailyard.pullSecrets" -}}
{{- with .Values.images.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
{{- end -}}

{{/* Pods begin anew when what they read at their start has changed. */}}
{{- define "sailyard.checksums" -}}
checksum/config: {{ include (print $.Template.BasePath "/config.yaml") . | sha256sum }}
{{- end -}}

{{/* Writable places of our images: everything else is read-only. */}}
{{- define "sailyard.homeMounts" -}}
- {name: home, mountPath: /var/lib/sailyard}
- {name: tmp, mountPath: /tmp}
{{- end -}}
{{- define "sailyard.homeVolumes" -}}
- {name: home, emptyDir: {}}
- {name: tmp, emptyDir: {}}
{{- end -}}

{{- define "sailyard.yardEnv" -}}
- configMapRef: {name: {{ include "sailyard.fullname" . }}-yard}
- secretRef: {name: {{ include "sailyard.secret.yard" . }}}
{{- end -}}

{{- define "sailyard.airflowEnv" -}}
{{ include "sailyard.yardEnv" . }}
- configMapRef: {name: {{ include "sailyard.fullname" . }}-launcher}
- configMapRef: {name: {{ include "sailyard.fullname" . }}-airflow}
- secretRef: {name: {{ include "sailyard.secret.airflow" . }}}
{{- end -}}

{{/* Airflow's components must not meet a database that is older than they are. */}}
{{- define "sailyard.waitForMigrations" -}}
- name: wait-for-migrations
  image: {{ include "sailyard.image" (dict "root" . "image" .Values.images.slim) }}
  imagePullPolicy: {{ .Values.images.pullPolicy }}
  command: [airflow, db, check-migrations, --migration-wait-timeout=900]
  envFrom:
    {{- include "sailyard.airflowEnv" . | nindent 4 }}
  resources: {requests: {cpu: 50m, memory: 256Mi}, limits: {memory: 1Gi}}
  volumeMounts:
    {{- include "sailyard.homeMounts" . | nindent 4 }}
  {{- include "sailyard.containerSecurity" . | nindent 2 }}
{{- end -}}
