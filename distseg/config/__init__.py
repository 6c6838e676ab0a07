"""What an experiment is: schema.py joins the sections of every room, load.py reads them."""
