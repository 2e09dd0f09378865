#!/usr/bin/env bash
# Holds deploy/kubernetes against the schemas of Kubernetes 1.34, which test/kubernetes/schemas has from a real API server.
# kustomize and kubeconform are Go modules, built once into ~/.cache/muond/kubernetes/bin.
set -euo pipefail
cd "$(dirname "$0")/../.."
bin=${XDG_CACHE_HOME:-$HOME/.cache}/muond/kubernetes/bin
command -v go >/dev/null || { echo 'manifests are not checked: there is no Go'; echo '0 passed, 0 failed'; exit 0; }
install() { [ -x "$bin/${1##*/}" ] || GOBIN=$bin GOTOOLCHAIN=local go install "$2@$3"; }
install kubeconform github.com/yannh/kubeconform/cmd/kubeconform v0.7.0
install kustomize sigs.k8s.io/kustomize/kustomize/v5 v5.7.1
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
for size in shards-1 shards-4 shards-16 example-gpu; do
  "$bin/kustomize" build "deploy/kubernetes/$size" >"$folder/$size.yaml"
done
"$bin/kustomize" build test/kubernetes/leases >"$folder/leases.yaml"
"$bin/kubeconform" -strict -summary -schema-location 'test/kubernetes/schemas/{{ .ResourceKind }}.json' "$folder"/*.yaml
# What a check that lets everything pass would not see.
sed 's/podManagementPolicy/podManagmentPolicy/' "$folder/shards-1.yaml" >"$folder/wrong.yaml"
if "$bin/kubeconform" -strict -schema-location 'test/kubernetes/schemas/{{ .ResourceKind }}.json' "$folder/wrong.yaml"; then
  echo 'a field that is misspelt was not found'
  exit 1
fi
echo '2 passed, 0 failed'
