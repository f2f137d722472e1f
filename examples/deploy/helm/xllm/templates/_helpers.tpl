{{/* Labels that select the pods of a component; takes root and component. */}}
{{- define "xllm.selector" -}}
app.kubernetes.io/name: xllm
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end }}

{{- define "xllm.labels" -}}
{{ include "xllm.selector" . }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ .root.Chart.Name }}-{{ .root.Chart.Version }}
{{- end }}

{{/* An image, by what the chart says of all and what one part says of its own. */}}
{{- define "xllm.image" -}}
{{- $own := .own | default dict -}}
{{ $own.repository | default .root.Values.image.repository }}:{{ $own.tag | default .root.Values.image.tag }}
{{- end }}

{{- define "xllm.etcd" -}}
{{ .Values.etcd.address | default (printf "http://%s-etcd:2379" .Release.Name) }}
{{- end }}

{{- define "xllm.secret" -}}
{{- if .Values.auth.existingSecret -}}
{{ .Values.auth.existingSecret }}
{{- else -}}
{{- $_ := required "auth.adminToken and auth.existingSecret are both empty; give one." .Values.auth.adminToken -}}
{{ .Release.Name }}-tokens
{{- end -}}
{{- end }}

{{/* What all pods have in common. Kubernetes' variables of services would be read as settings. */}}
{{- define "xllm.pod" -}}
enableServiceLinks: false
automountServiceAccountToken: false
{{- with .Values.imagePullSecrets }}
imagePullSecrets: {{ toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{/* Addresses of instances that do not register themselves, separated by commas. */}}
{{- define "xllm.addresses" -}}
{{- $found := list -}}
{{- range $one := .Values.instances -}}
{{- if eq false $one.registers -}}
{{- range $n := until (int ($one.replicas | default 1)) -}}
{{- $service := printf "%s-%s" $.Release.Name $one.name -}}
{{- $found = append $found (printf "http://%s-%d.%s:8000" $service $n $service) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{ join "," $found }}
{{- end }}
