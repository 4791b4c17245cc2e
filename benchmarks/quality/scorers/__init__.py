"""The scorers: small networks, trained on renders, that say what a picture shows."""
