"""Names that who packs for a GPU machine and who unpacks there have in common."""

# A tar of a folder `bundle`, without weights.
BUNDLE_ARCHIVE, BUNDLE_FOLDER = "bundle.tar.xz", "bundle"
# The beginning of the names of the parts of one archive with TensorRT-RTX's modules and libraries.
RTX_PART = "rtx.tar.xz."
# In the folder that is kept from one call to the next.
PACKAGES, SUBJECT_FILE = "packages", "cup.subject"
