"""What launches of the GPU engines need besides the inputs, made without waiting for the device."""
