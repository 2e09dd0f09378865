#!/usr/bin/env bash
# The dashboard in headless Chromium, which is installed where Debian has it and the machine does not. The project must be built.
set -euo pipefail
cd "$(dirname "$0")/../.."
[ -n "${CHROMIUM:-}" ] || command -v chromium google-chrome >/dev/null || {
  apt-get update -q
  DEBIAN_FRONTEND=noninteractive apt-get install -qy --no-install-recommends chromium fonts-dejavu-core
}
npx tap --jobs=1 dist/test/browser/dashboard.js
