"""Speed, measured; see README.md here."""
