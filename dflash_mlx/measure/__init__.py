"""What bench and doctor report: timing, comparison and summaries; nothing is drawn here."""
