"""Where images come from: record files, synthetic faces, pairs; and the batches made of them."""

import os
import sys

# OpenCV decodes up to a billion pixels, and takes the memory for as many as a damaged or hostile
# header announces. It reads this once, when it is loaded, so it has to be set before that.
OPENCV_IS_LIMITED = "cv2" not in sys.modules
os.environ.setdefault("OPENCV_IO_MAX_IMAGE_PIXELS", str(2**26))
