"""gRPC over an EngineClient: the service apt.v1.Inference, health and reflection."""
