#!/usr/bin/env bash
# The trainers of examples/ in Go, Rust, Java and C++: each is built, trains against a real service, and is held against the
# protocol by `muond conformance`. A language whose tools are not there is named and left out. They do not retry, so no
# connection is cut. Builds are kept in the user's cache. The project must be built. The last line is `N passed, N failed`.
set -uo pipefail
cd "$(dirname "$0")/../.."
root=$PWD
cache=${XDG_CACHE_HOME:-$HOME/.cache}/muond/languages
mkdir -p "$cache"
faults=reconnect,receipt,overloaded,refused,draining,not-finite,lost-run
service=
# It has nothing to keep, and whoever reads this script's output waits for all that could write there.
trap '[ -z "$service" ] || kill -KILL "$service" 2>/dev/null' EXIT
passed=0
failed=0
check() {
  local begun=$SECONDS
  if "${@:2}" >"$cache/log" 2>&1; then
    passed=$((passed + 1))
    echo "-- passed, $((SECONDS - begun)) seconds: $1"
  else
    failed=$((failed + 1))
    cat "$cache/log"
    echo "-- failed, $((SECONDS - begun)) seconds: $1"
  fi
}

# Two headers of C++ are all that a machine with compilers lacks, and quickly had.
if command -v g++ >/dev/null && ! { [ -e /usr/include/boost/beast.hpp ] && [ -e /usr/include/msgpack.hpp ]; }; then
  apt-get update -q >/dev/null && apt-get install -qy --no-install-recommends libboost-dev libmsgpack-cxx-dev >/dev/null
fi

build_go() { cd examples/go && go vet . && go build -o "$cache/go" .; }
run_go() { "$cache/go" "$1"; }
build_rust() { cd examples/rust && CARGO_TARGET_DIR=$cache/rust cargo build --quiet; }
run_rust() { "$cache/rust/debug/trainer" "$1"; }
build_java() {
  [ -e "$cache"/java/msgpack-core-*.jar ] ||
    mvn -q -B -f examples/java/pom.xml dependency:copy-dependencies -DoutputDirectory="$cache/java" || return 1
  javac -Xlint:all -Werror -d "$cache/java" -cp "$cache/java/*" examples/java/src/main/java/Trainer.java
}
run_java() { java -cp "$cache/java:$cache/java/*" Trainer "$1"; }
build_cpp() {
  [ "$cache/cpp" -nt examples/cpp/trainer.cpp ] ||
    g++ -std=c++17 -O1 -Wall -ffp-contract=off examples/cpp/trainer.cpp -o "$cache/cpp" -pthread
}
run_cpp() { "$cache/cpp" "$(cut -d : -f 1 <<<"${1#ws://}")" "${1##*:}"; }

in_folder() { (cd "$root" && "$@"); }
trains() { in_folder timeout 60 bash -c "$(declare -f "run_$1"); cache=$cache; run_$1 $2"; }
conforms() {
  in_folder timeout 120 node dist/src/server.js conformance ws://127.0.0.1:0 --slow 1 --patience 30 --skip "$faults" \
    -- bash -c "$(declare -f "run_$1"); cache=$cache; run_$1 {url}"
}

exec 3< <(exec node dist/src/server.js --device cpu --port 0 2>/dev/null)
service=$!
# The first line of its log is that it listens.
read -r -t 60 line <&3 && url=$(grep -oE '"address":"[^"]+"' <<<"$line" | cut -d '"' -f 4)
[ -n "${url:-}" ] || { echo 'the service did not start'; echo '0 passed, 1 failed'; exit 1; }
url=${url/http/ws}

language() {
  local name=$1 tool
  for tool in "${@:2}"; do
    command -v "$tool" >/dev/null || { echo "-- $name: no toolchain, $tool is not there"; return; }
  done
  check "$name: builds" in_folder "build_$name"
  check "$name: trains" trains "$name" "$url"
  check "$name: conforms" conforms "$name"
}
language go go
language rust cargo
language java javac mvn
language cpp g++
# Of the generated client go vet finds what does not compile.
contract() {
  mkdir -p "$cache/contract" &&
    (cd "$cache/contract" && rm -f go.mod go.sum && go mod init muond.example/contract &&
      go run github.com/oapi-codegen/oapi-codegen/v2/cmd/oapi-codegen@latest -generate types,client -package muond \
        "$root/openapi.yaml" >muond.go && go mod tidy && go vet .)
}
if command -v go >/dev/null; then check 'go: oapi-codegen makes a client of openapi.yaml' contract; fi
check 'each has at most 90 lines' bash -c '[ "$(wc -l examples/go/main.go examples/rust/src/main.rs \
  examples/java/src/main/java/Trainer.java examples/cpp/trainer.cpp | awk "\$1 > 90 && \$2 != \"total\"" | wc -l)" -eq 0 ]'
echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]
