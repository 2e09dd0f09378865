#!/bin/sh
# Puts ONNX Runtime with its CUDA provider into a folder: libonnxruntime and the provider of the same version, out of the
# Python wheel, whose checksum is verified. Needs Python 3 with pip.   Usage: onnxruntime-gpu.sh FOLDER
set -eu
folder=$1
version=1.30.0
sha256=6acc0f4b3d5ac5f2984432faa59dd8fcce6775f8b43a7140afa0f322c7a703b1

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
echo "onnxruntime-gpu==$version --hash=sha256:$sha256" > "$work/requirements.txt"
# One wheel, whatever Python this is: nothing of it is imported.
python3 -m pip download --quiet --no-deps --require-hashes --only-binary=:all: --implementation cp --python-version 3.12 \
  --abi cp312 --platform manylinux_2_28_x86_64 --dest "$work" --requirement "$work/requirements.txt"
python3 -m zipfile -e "$work"/onnxruntime_gpu-*.whl "$work/wheel"
mkdir -p "$folder"
for name in "libonnxruntime.so.$version" libonnxruntime_providers_cuda.so libonnxruntime_providers_shared.so; do
  mv "$work/wheel/onnxruntime/capi/$name" "$folder/"
done
