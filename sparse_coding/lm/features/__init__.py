"""What each feature responds to, and features.html, which shows it."""
