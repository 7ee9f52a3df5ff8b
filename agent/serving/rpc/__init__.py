"""The gRPC form of the local inference API. Imported only where the configuration asks for it: it needs grpcio."""
