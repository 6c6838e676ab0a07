"""What people look at: figures and HTML pages."""
