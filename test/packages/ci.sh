#!/usr/bin/env bash
# What a user installs: the packages of npm and of Python, each in an empty folder, the service of the one with the clients of both.
# The project must be built. The last line is `N passed, N failed`.
set -uo pipefail
cd "$(dirname "$0")/../.."
root=$PWD
folder=$(mktemp -d)
service=
url=
trap '[ -z "$service" ] || kill "$service" 2>/dev/null; rm -rf "$folder"' EXIT
passed=0
failed=0
check() {
  echo "-- $1"
  if "${@:2}"; then passed=$((passed + 1)); else failed=$((failed + 1)); echo "-- failed: $1"; fi
}

# Nothing of the checkout may help: neither its node_modules nor its dist. ONNX Runtime's script would download a provider for
# GPUs that muond does not use.
npm_package() { npm pack --silent --ignore-scripts --pack-destination "$folder" >/dev/null; }
npm_install() {
  mkdir "$folder/node" && cd "$folder/node" && echo '{ "private": true, "type": "module" }' >package.json &&
    ONNXRUNTIME_NODE_INSTALL=skip npm install --no-audit --no-fund --silent "$folder"/muond-*.tgz
}
has_files() {
  local files
  files=$(tar -tzf "$folder"/muond-*.tgz) &&
    for file in LICENSE README.md openapi.yaml asyncapi.yaml CHANGELOG.md ui/index.html presets/kimi-k2.yaml kernels/cuda/gemm.cu \
      docs/frames/client/open.msgpack; do
      grep -qx "package/$file" <<<"$files" || { echo "the package lacks $file"; return 1; }
    done
  ! grep -E '^package/(test|bench|src|examples)/|dist/(test|bench)' <<<"$files"
}
starts() {
  cd "$folder/node" && npx --no-install muond --version && npx --no-install muond presets >/dev/null || return 1
  # The first line of its log is that it listens.
  exec 3< <(exec node_modules/.bin/muond --device cpu --port 0)
  service=$!
  read -r -t 60 line <&3 || return 1
  url=$(grep -oE '"address":"[^"]+"' <<<"$line" | cut -d '"' -f 4)
  [ -n "$url" ] && curl -fsS "$url/livez" && says "$url/ui" '<title>muond' && says "$url/ui/uPlot.iife.min.js" uPlot
}
# The whole answer is read: where grep ends first, curl fails.
says() { grep -q "$2" <<<"$(curl -fsS "$1")"; }
trains_node() {
  cd "$folder/node" && cp "$root/test/packages/train.mjs" . && node train.mjs "${url/http/ws}"
}
python_package() {
  python3 -m venv "$folder/build" && "$folder/build/bin/pip" install --quiet build &&
    "$folder/build/bin/python" -m build --outdir "$folder/python" "$root/clients/python" >/dev/null &&
    tar -xzf "$folder"/python/muond-*.tar.gz -C "$folder/python" --wildcards '*/LICENSE' &&
    cmp "$folder"/python/muond-*/LICENSE "$root/LICENSE"
}
python_install() { python3 -m venv "$folder/venv" && "$folder/venv/bin/pip" install --quiet "$folder"/python/muond-*.whl; }
trains_python() { cd "$folder" && "$folder/venv/bin/python" "$root/test/packages/train.py" "${url/http/ws}"; }
sbom() { cd "$root" && npm run --silent sbom | node -e 'JSON.parse(require("fs").readFileSync(0)).components.length > 50 || process.exit(1)'; }

check 'npm pack' npm_package
check 'the package has what it needs, and no tests' has_files
check 'npm install in an empty folder' npm_install
check 'muond starts from there, with its dashboard' starts
check 'muond/client trains' trains_node
check 'python -m build' python_package
check 'pip install in an empty environment' python_install
check 'the Python client trains' trains_python
check 'npm run sbom' sbom
echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]
