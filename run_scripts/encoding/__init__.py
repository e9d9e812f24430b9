"""What encode.py does on a cluster; these modules import the library only when they are used."""
