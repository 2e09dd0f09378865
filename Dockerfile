# Two images of one build:   docker build --target cpu -t muond .   and   docker build --target cuda -t muond:cuda .
# They listen on every address, so they start with keys only (MUOND_KEYS_FILE, MUOND_API_KEYS) and with TLS (MUOND_TLS_CERT, MUOND_TLS_KEY);
# MUOND_INSECURE_NO_TLS=true is for a proxy in front that has TLS (docs/security.md).
# The health check asks the socket in /run/muond, which needs no certificate where clients need one (mutual TLS). Any user may
# make it; with a read-only root, /run/muond has to be a tmpfs, or MUOND_SOCKET empty: then the check goes over the port.
# `npm run test:image` carries these steps out in plain folders (deploy/dockerfile.test.ts).

FROM node:24-bookworm-slim AS build
WORKDIR /muond
COPY package.json package-lock.json .npmrc ./
RUN npm ci
COPY tsconfig.json openapi.yaml asyncapi.yaml ./
COPY kernels kernels
COPY presets presets
COPY src src
COPY ui ui
RUN npx tsc && npm prune --omit=dev

FROM python:3.12-slim AS provider
WORKDIR /muond
ENV MUOND_ONNXRUNTIME_DIR=/opt/onnxruntime
COPY deploy/onnxruntime-gpu.sh deploy/
RUN sh deploy/onnxruntime-gpu.sh "$MUOND_ONNXRUNTIME_DIR"

FROM node:24-bookworm-slim AS cpu
WORKDIR /muond
ENV MUOND_HOST=0.0.0.0 MUOND_DEVICE=cpu MUOND_SOCKET=/run/muond/muond.sock NODE_ENV=production
COPY --from=build /muond/package.json /muond/openapi.yaml /muond/asyncapi.yaml ./
COPY --from=build /muond/node_modules node_modules
COPY --from=build /muond/dist dist
COPY --from=build /muond/kernels/cuda/*.cu kernels/cuda/
COPY --from=build /muond/presets presets
COPY --from=build /muond/ui ui
COPY deploy/healthcheck.js deploy/
RUN mkdir -p -m 1777 "$(dirname "$MUOND_SOCKET")"
USER node
EXPOSE 8787
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s CMD ["node", "deploy/healthcheck.js"]
ENTRYPOINT ["node", "dist/src/server.js"]

# CUDA 13: cudart, cuBLAS, cuRAND and NVRTC; the driver (580 or later) comes with the container runtime.
FROM nvidia/cuda:13.0.1-runtime-ubuntu24.04 AS cuda
WORKDIR /muond
ENV MUOND_HOST=0.0.0.0 MUOND_DEVICE=cuda MUOND_SOCKET=/run/muond/muond.sock MUOND_ONNXRUNTIME_DIR=/opt/onnxruntime NODE_ENV=production
COPY --from=build /usr/local/bin/node /usr/local/bin/
COPY --from=provider /opt/onnxruntime /opt/onnxruntime
COPY --from=build /muond/package.json /muond/openapi.yaml /muond/asyncapi.yaml ./
COPY --from=build /muond/node_modules node_modules
COPY --from=build /muond/dist dist
COPY --from=build /muond/kernels/cuda/*.cu kernels/cuda/
COPY --from=build /muond/presets presets
COPY --from=build /muond/ui ui
COPY deploy/healthcheck.js deploy/
RUN mkdir -p -m 1777 "$(dirname "$MUOND_SOCKET")"
USER 1000:1000
EXPOSE 8787
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s CMD ["node", "deploy/healthcheck.js"]
ENTRYPOINT ["node", "dist/src/server.js"]
