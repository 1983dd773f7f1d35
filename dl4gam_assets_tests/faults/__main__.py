from dl4gam_assets_tests.faults.table import main

main()
