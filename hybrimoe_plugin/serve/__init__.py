"""The server: one loaded model, many clients."""
