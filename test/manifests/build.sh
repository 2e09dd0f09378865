#!/usr/bin/env bash
# Writes what `kubectl apply -k` of each size would apply into a folder. kustomize is a Go module, which is
# built once into ~/.cache/muond/kubernetes/bin.
set -euo pipefail
cd "$(dirname "$0")/../.."
bin=${XDG_CACHE_HOME:-$HOME/.cache}/muond/kubernetes/bin
[ -x "$bin/kustomize" ] || GOBIN=$bin GOTOOLCHAIN=local go install sigs.k8s.io/kustomize/kustomize/v5@v5.7.1
for size in shards-1 shards-4 shards-16 example-gpu; do
  "$bin/kustomize" build "deploy/kubernetes/$size" >"$1/$size.yaml"
done
"$bin/kustomize" build test/kubernetes/leases >"$1/leases.yaml"
