"""DICOM series as a scanner leaves them: a file per slice, positions in millimetres."""

import locale
import os

import SimpleITK as sitk


def write_series(folder, image, uid, spacing=(2.0, 0.8, 0.9), patient="17", name="Doe^Jane", modality="MR", ending="", **odd):
    """``spacing`` and positions in the order of the array's axes, slices first. ``odd``: {slice number: {tag: value}}, or
    ``skip``: slices that are missing."""
    os.makedirs(folder, exist_ok=True)
    text = locale.setlocale(locale.LC_ALL)  # GDCM sets it to C
    volume = sitk.GetImageFromArray(image)
    volume.SetSpacing(tuple(map(float, spacing[::-1])))
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    for k in range(image.shape[0]):
        if k in odd.get("skip", ()):
            continue
        tags = {
            "0008|0008": "ORIGINAL\\PRIMARY\\AXIAL",
            "0008|0018": f"{uid}.{k + 1}",
            "0008|0060": modality,
            "0010|0010": name,
            "0010|0020": patient,
            "0020|000d": f"{uid}.0",
            "0020|000e": uid,
            "0020|0013": str(k),
            "0020|0032": f"0\\0\\{k * spacing[0]}",
            "0020|0037": "1\\0\\0\\0\\1\\0",
            **odd.get("tags", {}).get(k, {}),
        }
        plane = volume[:, :, k]
        for tag, value in tags.items():
            plane.SetMetaData(tag, value)
        file = os.path.join(folder, f"{name}_{image.shape[0] - k:04d}.dcm")  # names do not tell the order
        writer.SetFileName(file)
        writer.Execute(plane)
        os.rename(file, file[: -len(".dcm")] + ending)
    locale.setlocale(locale.LC_ALL, text)
