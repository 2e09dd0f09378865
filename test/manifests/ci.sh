#!/usr/bin/env bash
# Holds deploy/kubernetes against the schemas of Kubernetes 1.34, which test/kubernetes/schemas has from a real API server.
# kubeconform is a Go module, which is built once into ~/.cache/muond/kubernetes/bin.
set -euo pipefail
cd "$(dirname "$0")/../.."
command -v go >/dev/null || { echo 'manifests are not checked: there is no Go'; exit 0; }
bin=${XDG_CACHE_HOME:-$HOME/.cache}/muond/kubernetes/bin
[ -x "$bin/kubeconform" ] || GOBIN=$bin GOTOOLCHAIN=local go install github.com/yannh/kubeconform/cmd/kubeconform@v0.7.0
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
bash test/manifests/build.sh "$folder"
check() { "$bin/kubeconform" -strict -summary -schema-location 'test/kubernetes/schemas/{{ .ResourceKind }}.json' "$@"; }
check "$folder"/*.yaml
# A check that lets everything pass would not find this one.
sed 's/podManagementPolicy/podManagmentPolicy/' "$folder/shards-1.yaml" >"$folder/wrong"
if check - <"$folder/wrong" >/dev/null; then
  echo 'a field that is misspelt was not found'
  exit 1
fi
echo '2 passed, 0 failed'
