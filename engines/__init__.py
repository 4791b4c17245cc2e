"""What turns a bundle's networks into files a device runs. Needs no PyTorch: it also works on the target."""
