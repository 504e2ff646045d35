"""The other side of `speed_prepare`: files read as anyone reads them, `dcmread(f).pixel_array`, in a process that has never imported mscan.

A line of standard input is a list of files; a line of standard output says that all of them are read."""
import json
import sys

import pydicom


def read(file):
    dataset = pydicom.dcmread(file)
    dataset.pixel_array_options(decoding_plugin='pylibjpeg')
    return dataset.pixel_array


if __name__ == '__main__':
    for line in sys.stdin:
        for file in json.loads(line): read(file)
        print('done', flush=True)
