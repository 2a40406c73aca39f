#!/usr/bin/env bash
# Builds the image without Docker and without a registry of images, and lets its server answer.
#
#   deploy/image.sh [FLAGS OF buildah build]
#
# As root on Debian, with buildah and mmdebstrap: the base is made from Debian's packages. Flags may carry pip's settings:
#   --volume "$HOME/.config/pip/pip.conf:/etc/pip.conf:ro" --build-arg TORCH_INDEX=
#
# WORK: a folder for all of it, about 10 GB, kept if given; else a temporary one. IMAGE: the name. PORT: where it answers.
set -euo pipefail
cd "$(dirname "$0")/.."

IMAGE=${IMAGE:-apt}
PORT=${PORT:-8000}
SUITE=bookworm
if [ -z "${WORK:-}" ]; then
    WORK=$(mktemp -d)
    trap 'rm -rf "$WORK"' EXIT
fi
mkdir -p "$WORK/tmp"
export TMPDIR="$WORK/tmp" BUILDAH_ISOLATION=chroot

buildah_here() {
    buildah --root "$WORK/storage" --runroot "$WORK/run" --storage-driver vfs "$@"
}

make_base() {
    buildah_here inspect --type image "localhost/$SUITE-python" >/dev/null 2>&1 && return
    echo "== Base: Debian $SUITE with Python"
    [ -f "$WORK/base.tar" ] ||
        mmdebstrap --quiet --variant=minbase --include=python3,python3-venv,ca-certificates "$SUITE" "$WORK/base.tar"
    local container
    container=$(buildah_here from scratch)
    buildah_here add --quiet "$container" "$WORK/base.tar" / >/dev/null
    buildah_here commit --quiet --rm "$container" "localhost/$SUITE-python" >/dev/null
}

build() {
    echo "== Image"
    # --layers=false: vfs keeps a whole copy of the files for each layer. docker: OCI's format knows no HEALTHCHECK.
    buildah_here build --format docker --layers=false --build-arg "BASE=localhost/$SUITE-python" \
        --build-arg "REVISION=$(git rev-parse HEAD)" --tag "$IMAGE" "$@" .
    buildah_here images "localhost/$IMAGE"
}

# The server as the image starts it, on 127.0.0.1: a chroot has no network of its own. buildah passes no signal on, so
# the server's number is noted.
try_server() {
    echo "== Its server"
    local container server command key
    container=$(buildah_here from "localhost/$IMAGE")
    run() { buildah_here run "$container" -- "$@"; }
    # shellcheck disable=SC2016
    command='echo $$ >/tmp/server.pid; exec apt-serve start "$@"'
    run sh -c "$command" - --host 127.0.0.1 --port "$PORT" --runner uvicorn --access.enabled=true &
    server=$!
    key=$(run apt-serve keys create --owner image-check)
    run python3 - "http://127.0.0.1:$PORT" /tmp/server.pid "$key" <deploy/image_check.py
    wait "$server"
    echo "The server ended with 0"
    buildah_here rm "$container" >/dev/null
}

make_base
build "$@"
try_server
