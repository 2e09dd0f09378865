#!/usr/bin/env bash
# The coordinator with a real etcd, which is installed where Debian has it and the machine does not. The project must be built.
set -euo pipefail
cd "$(dirname "$0")/../.."
command -v etcd >/dev/null || {
  apt-get update -q
  DEBIAN_FRONTEND=noninteractive apt-get install -qy --no-install-recommends etcd-server
}
# Only here is there an etcd, so the coverage of its files is counted here, and not in the suite (package.json).
npx c8 --all=false --include 'dist/src/cluster/coordinator/etcd/**' --exclude '**/*.test.js' --temp-directory .c8-etcd \
  npx tap --jobs=1 dist/test/cluster/coordinator/etcd.js
