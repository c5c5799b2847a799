"""What there is to run on: devices, their memory and speed, here and on workers."""
