"""Raw files, images, splits and candidate lists."""
