"""From a run to what its network says of images, at their own size."""
