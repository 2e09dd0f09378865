#!/usr/bin/env bash
# Builds kube-apiserver from its Go module into ~/.cache/muond/kubernetes, once: a quarter of an hour of one core. Prints its path.
set -euo pipefail
cd "$(dirname "$0")/apiserver"
version=$(sed -nE 's/^require k8s.io\/kubernetes (v[0-9.]+)$/\1/p' go.mod)
folder=${XDG_CACHE_HOME:-$HOME/.cache}/muond/kubernetes
binary=$folder/kube-apiserver-$version
if [ ! -x "$binary" ]; then
  mkdir -p "$folder"
  # Without its version an API server takes itself for an unknown release, and refuses to start.
  stamp=k8s.io/component-base/version
  CGO_ENABLED=0 GOTOOLCHAIN=local GOFLAGS="-mod=mod -p=${MUOND_BUILD_JOBS:-2}" nice -n 19 go build -trimpath -o "$binary.new" \
    -ldflags "-s -w -X $stamp.gitVersion=$version -X $stamp.gitMajor=1 -X $stamp.gitMinor=$(cut -d. -f2 <<<"$version")" \
    k8s.io/kubernetes/cmd/kube-apiserver 1>&2
  mv "$binary.new" "$binary"
fi
echo "$binary"
