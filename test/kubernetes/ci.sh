#!/usr/bin/env bash
# The coordinator and the manifests with a real kube-apiserver and a real etcd. The first run builds the API server: see
# build-apiserver.sh. With RECORD=1 it writes contract.json and schemas/ anew, which CI has instead. The project must be built.
set -euo pipefail
cd "$(dirname "$0")/../.."
command -v etcd >/dev/null || {
  apt-get update -q
  DEBIAN_FRONTEND=noninteractive apt-get install -qy --no-install-recommends etcd-server
}
KUBE_APISERVER=$(bash test/kubernetes/build-apiserver.sh)
MANIFESTS=$(mktemp -d)
trap 'rm -rf "$MANIFESTS"' EXIT
bash test/manifests/build.sh "$MANIFESTS"
export KUBE_APISERVER MANIFESTS
npx tap --jobs=1 dist/test/kubernetes/kubernetes.js
