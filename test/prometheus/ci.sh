#!/usr/bin/env bash
# A real Prometheus, which is installed where Debian has it and the machine does not. The project must be built.
set -euo pipefail
cd "$(dirname "$0")/../.."
{ command -v prometheus && command -v promtool; } >/dev/null || {
  apt-get update -q
  DEBIAN_FRONTEND=noninteractive apt-get install -qy --no-install-recommends prometheus
}
npx tap --jobs=1 dist/test/prometheus/prometheus.js
