"""Local disk and object stores: locations, atomic writes, retries, claims, credentials."""
