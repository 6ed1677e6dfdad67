"""What a person sees: measurements, reports, the command line."""
