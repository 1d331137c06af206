from nnunetv2_cva.installation.versions import check_versions

check_versions()
