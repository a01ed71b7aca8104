"""What an op is: definitions in plain torch, and the types that flow between model, ops and backends."""
