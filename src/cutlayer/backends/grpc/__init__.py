"""Clients in processes of their own, over gRPC with mutual TLS."""
