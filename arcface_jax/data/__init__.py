"""Sources of images (record files, synthetic faces, pairs) and the batches made from them."""

import os
import sys

# OpenCV decodes up to a billion pixels, and allocates the memory that a damaged or hostile header
# asks for. It reads this limit once, when it is loaded, so it has to be set before that.
OPENCV_IS_LIMITED = "cv2" not in sys.modules
os.environ.setdefault("OPENCV_IO_MAX_IMAGE_PIXELS", str(2**26))
