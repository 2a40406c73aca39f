"""The training sidecar. It meets the server on disk (checkpoints) and over HTTP (reload), never by import."""
