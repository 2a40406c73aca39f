"""`apt-serve doctor`: whether a server with these settings would start here and run well, and what to do if not."""
