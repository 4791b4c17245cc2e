"""File names that benchmarks.gpu.pack writes and the steps on the GPU machine read."""

# A tar archive of the folder `bundle`, without weights.
BUNDLE_ARCHIVE, BUNDLE_FOLDER = "bundle.tar.xz", "bundle"
# Name prefix of the parts of an archive with TensorRT-RTX's modules and libraries.
RTX_PART = "rtx.tar.xz."
# In the work folder, which is kept between calls.
PACKAGES, SUBJECT_FILE = "packages", "cup.subject"
